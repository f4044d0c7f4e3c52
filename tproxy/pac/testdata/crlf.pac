function FindProxyForURL(url, host)
{
    // l
    if (host == "a.example")
        return "DIRECT";
    return "PROXY crlf.example:8080";
}
