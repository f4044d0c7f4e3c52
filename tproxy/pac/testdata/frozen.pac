// Scripts must not be able to hurt the next call by changing the library.
isPlainHostName = function () { throw "replaced"; };
Object.prototype.toString = null;
Array.prototype.join = function () { return "x"; };
String.prototype.toLowerCase = function () { for (;;); };
function FindProxyForURL(url, host) { return "PROXY still:1"; }
