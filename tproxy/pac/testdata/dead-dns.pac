function FindProxyForURL(url, host) { return isResolvable("dead.example") || isResolvable("dead2.example") ? "DIRECT" : "PROXY unresolved:1"; }
