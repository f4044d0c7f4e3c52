function FindProxyForURL(url, host) {
    return /(x+x+)+\1y/.test(new Array(50).join("x")) ? "DIRECT" : "PROXY p:1";
}
