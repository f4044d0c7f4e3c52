var settings = undefinedSettings.proxy;
function FindProxyForURL(url, host) { return settings; }
