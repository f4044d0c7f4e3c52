// A table of networks, looked at in order.
var nets = [
    ["10.0.0.0", "255.0.0.0"],
    ["172.16.0.0", "255.240.0.0"],
    ["192.168.0.0", "255.255.0.0"],
    ["127.0.0.0", "255.0.0.0"]
];
function FindProxyForURL(url, host) {
    for (var i = 0; i < nets.length; i++) {
        if (isInNet(host, nets[i][0], nets[i][1])) return "DIRECT";
    }
    return "PROXY 203.0.113.1:3128";
}
