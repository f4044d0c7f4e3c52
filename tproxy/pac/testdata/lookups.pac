function FindProxyForURL(url, host) {
    var found = 0;
    for (var i = 0; i < 1000; i++) if (isResolvable("n" + i + ".many.example")) found++;
    return "PROXY found:" + found;
}
