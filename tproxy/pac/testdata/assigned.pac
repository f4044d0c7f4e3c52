var FindProxyForURL;
(function (exports) {
    exports.f = FindProxyForURL = function (url, host) { return "PROXY closure.example:8"; };
})({});
