function FindProxyForURL(url, host) {
    var o = { toString: function () { return "" + [o, o]; } };
    return [1].map(function f() { return [1].map(f); }) + o;
}
