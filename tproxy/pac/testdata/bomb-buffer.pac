function FindProxyForURL(url, host) { return "PROXY p:" + new Uint8Array(2e9).length; }
