function FindProxyForURL(url, host) { var s = "ab"; for (;;) s += s; }
