// What the script sees is handed back as names.
function FindProxyForURL(url, host) {
    return "PROXY " + url.replace(/[^a-z0-9]+/g, ".") + "x:" + host.length;
}
