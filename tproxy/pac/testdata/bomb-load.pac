var table = "t".repeat(3e9);
function FindProxyForURL(url, host) { return "DIRECT"; }
