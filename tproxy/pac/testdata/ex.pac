function FindProxyForURL(url, host) { return "PROXY old:1"; }
function FindProxyForURLEx(url, host) {
    if (isInNetEx(host, "2001:db8::/32")) return "DIRECT";
    if (isResolvableEx(host) && dnsResolveEx(host).indexOf(";") > 0) return "PROXY two:1";
    return "PROXY " + sortIpAddressList("10.0.0.2;2001:db8::2;10.0.0.1").split(";").length + ".example:1";
}
