function FindProxyForURL(url, host) {
    var address = dnsResolve(host);
    if (!address) return "PROXY nowhere.example:1";
    if (isInNet(address, "10.0.0.0", "255.0.0.0")) return "DIRECT";
    return "PROXY p.example:" + (convert_addr(address) & 0xffff);
}
