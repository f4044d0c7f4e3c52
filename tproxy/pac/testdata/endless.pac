function FindProxyForURL(url, host) {
    if (host == "fine.example") return "DIRECT";
    while (true) { }
}
