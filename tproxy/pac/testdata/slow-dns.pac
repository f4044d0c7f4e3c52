function FindProxyForURL(url, host) { return isInNet("slow.example", "10.0.0.0", "255.0.0.0") ? "PROXY inside:1" : "PROXY late:1"; }
