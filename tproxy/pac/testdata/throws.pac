function FindProxyForURL(url, host) {
    if (host == "null.example") return null.length;
    if (host == "undefined.example") return noSuchFunction(host);
    if (host == "multi.example") throw "one\nERROR two";
    if (host == "long.example") throw new Array(1e6).join("y");
    throw new Error("no way to " + host);
}
