function FindProxyForURL(url, host) {
    var a = [];
    for (var i = 0; i < 3e6; i++) a = [a];
    return JSON.stringify(a);
}
