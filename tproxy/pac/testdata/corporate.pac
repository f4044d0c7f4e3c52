// The split that most companies have: short names, own domains and private
// networks go direct, all else through one of two proxies.
function FindProxyForURL(url, host) {
    host = host.toLowerCase();
    if (isPlainHostName(host) ||
        dnsDomainIs(host, ".corp.example") ||
        localHostOrDomainIs(host, "www.example.org"))
        return "DIRECT";
    if (url.substring(0, 6) == "https:")
        return "PROXY secure1.corp.example:3128; PROXY secure2.corp.example:3128";
    if (shExpMatch(url, "http:*"))
        return "PROXY web.corp.example:8080; DIRECT";
    return "DIRECT";
}
