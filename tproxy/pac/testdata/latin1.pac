// FranÁois a Ècrit ceci
var grueﬂ = "PROXY latin.example:8080";
function FindProxyForURL(url, host) { return grueﬂ; }
