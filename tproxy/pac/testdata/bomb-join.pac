function FindProxyForURL(url, host) { return new Array(4e8).join("0123456789"); }
