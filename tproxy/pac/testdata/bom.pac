function FindProxyForURL(url, host) { return "PROXY bom.example:8080"; }
