function FindProxyForURL(url, host) { return 'a'.repeat(1e9); }
