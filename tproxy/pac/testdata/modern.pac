'use strict';
const PROXY = 'HTTPS tls.example:443';
let bypass = new Set(['a.example', 'b.example']);
const under = (host, zone) => host === zone || host.endsWith(`.${zone}`);
class Rules {
    constructor(...zones) { this.zones = zones; }
    has(host) { return this.zones.some(zone => under(host, zone)); }
}
const rules = new Rules('corp.example', 'lan');
var FindProxyForURL = (url, host) => {
    const [scheme = 'http'] = url.split(':');
    if (bypass.has(host) || rules.has(host)) return 'DIRECT';
    return scheme === 'https' ? PROXY : 'PROXY plain.example:3128';
};
