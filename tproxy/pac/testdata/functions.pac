// Each function once; the answer counts what was as expected.
function FindProxyForURL(url, host) {
    var checks = [
        isPlainHostName("www") && !isPlainHostName("www.example") && !isPlainHostName("::1"),
        dnsDomainIs("www.example", ".example") && !dnsDomainIs("www.example", ".org"),
        localHostOrDomainIs("www", "www.example") && localHostOrDomainIs("www.example", "www.example") && !localHostOrDomainIs("home.example", "www.example"),
        isResolvable("two.example") && !isResolvable("none.example"),
        isInNet("198.51.100.7", "198.51.100.0", "255.255.255.0") && !isInNet("198.51.101.7", "198.51.100.0", "255.255.255.0"),
        isInNet("198.51.100.9", "0.0.0.9", "0.0.0.255"),
        dnsResolve("inside.example") === "10.1.2.3" && dnsResolve("none.example") === null,
        convert_addr("104.16.41.2") === 1745889538 && convert_addr("200.0.0.0") < 0 && convert_addr("x") === 0,
        myIpAddress() === "192.0.2.1",
        dnsDomainLevels("www") === 0 && dnsDomainLevels("a.b.c") === 2,
        shExpMatch("a.b.example", "*.example") && !shExpMatch("aXexample", "*.example"),
        dnsResolveEx("two.example") === "198.51.100.2;2001:db8::2" && dnsResolveEx("none.example") === "",
        isResolvableEx("six.example") && !isResolvable("six.example"),
        isInNetEx("198.51.100.7", "198.51.100.0/24") && isInNetEx("2001:db8::1", "2001:db8::/32"),
        myIpAddressEx() === "192.0.2.1;2001:db8::1",
        sortIpAddressList("10.2.3.9;2001:4898:28:3:201:2ff:feea:fc14;::1;127.0.0.1;::9") === "::1;::9;2001:4898:28:3:201:2ff:feea:fc14;10.2.3.9;127.0.0.1",
        sortIpAddressList("10.0.0.1;x") === false,
        getClientVersion() === "1.0",
        alert("seen") === undefined
    ];
    var wrong = [];
    for (var i = 0; i < checks.length; i++) if (!checks[i]) wrong.push(i);
    return "PROXY " + (wrong.length ? "wrong-" + wrong.join("-") : "right") + ":" + checks.length;
}
