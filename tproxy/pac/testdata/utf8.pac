// Größe, 代理, привет
var größe = "PROXY utf8.example:8080", 代理 = größe;
function FindProxyForURL(url, host) { return 代理; }
