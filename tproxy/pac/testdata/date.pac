function FindProxyForURL(url, host) { return new Date().getFullYear() > 2000 ? "PROXY now.example:1" : "DIRECT"; }
