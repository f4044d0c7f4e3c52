function FindProxyForURL(url, host) {
    var port = /:(\d+)\//.exec(url);
    switch (port ? +port[1] : 0) {
    case 22: case 2222: return "SOCKS5 ssh.example:1080";
    case 8443: return "HTTPS tls.example";
    default:
        if (/^(?:\d{1,3}\.){3}\d{1,3}$/.test(host)) return "PROXY byaddress.example:1";
        return "DIRECT";
    }
}
