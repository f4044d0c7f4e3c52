function FindProxyForURL(url, host) { return Math.random() < 2 ? "PROXY lot.example:1" : "DIRECT"; }
