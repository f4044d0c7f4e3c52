function FindProxyForURL(url, host) {
    var s = "x".repeat(1e5);
    return s.replace(/x/g, s);
}
