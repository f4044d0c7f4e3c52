// Spreads hosts over three proxies by a sum over the name; the next ones are there
// for when the first is down.
function FindProxyForURL(url, host) {
    var proxies = ["PROXY a.example:8080", "PROXY b.example:8080", "PROXY c.example:8080"];
    var sum = 0;
    for (var i = 0; i < host.length; i++) sum = (sum * 31 + host.charCodeAt(i)) % 65521;
    var start = sum % proxies.length, out = [];
    for (var k = 0; k < proxies.length; k++) out.push(proxies[(start + k) % proxies.length]);
    return out.join("; ");
}
