function FindProxyForURL(url, host) {
    var direct = ["*.intern.example", "wiki*", "?.short.example", "*/login/*", "*.a*b*c.example"];
    for (var i in direct)
        if (shExpMatch(host, direct[i]) || shExpMatch(url, direct[i])) return "DIRECT";
    return "HTTP p.example:81";
}
