// A large table that is built when the script is loaded.
var zones = {};
for (var i = 0; i < 50000; i++) zones["host" + i + ".example"] = "PROXY p" + (i % 7) + ".example:3128";
function FindProxyForURL(url, host) { return zones.hasOwnProperty(host) ? zones[host] : "DIRECT"; }
