function FindProxyForURL(url, host) {
    switch (host) {
    case "null.example": return null;
    case "nothing.example": return;
    case "empty.example": return "";
    case "number.example": return 42;
    case "object.example": return { toString: function () { return "DIRECT"; } };
    case "list.example": return ["PROXY a:1", "DIRECT"];
    case "stringobject.example": return new String("PROXY boxed:1");
    case "garbage.example": return "PROXY ; QUIC q:1; PROXY good:1; PROXY bad:99999; PROXY a b; SOCKS4 four; ;; proxy lower ;SOCKS s; HTTPS [2001:db8::5]";
    case "onlygarbage.example": return "PROXI typo:8080";
    case "many.example": return new Array(101).join("PROXY p:1;");
    case "long.example": return new Array(1e6).join("x");
    case "credentials.example": return "PROXY user:secret@p.example:1; PROXY http://p.example:1";
    }
    return "DIRECT";
}
