/* a head /* of many
 * lines */
function FindProxyForURL(url, host) // one
{
    // return "PROXY wrong:1";
    /* return "PROXY wrong:2"; */ return "PROXY right:3"; // return "PROXY wrong:4";
}
//# sourceMappingURL=/etc/passwd
