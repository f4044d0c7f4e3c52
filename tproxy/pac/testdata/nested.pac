function FindProxyForURL(url, host) {
    function inList(list) {
        function same(a) { return function (b) { return a === b || endsWith(b, "." + a); }; }
        for (var i = 0; i < list.length; i++) if (same(list[i])(host)) return true;
        return false;
    }
    function endsWith(text, tail) { return text.slice(-tail.length) === tail; }
    return inList(["one.example", "two.example"]) ? "SOCKS5 socks.example" : "DIRECT";
}
