package netfilter

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"go4.org/netipx"
	"golang.org/x/sys/unix"
)

// Obstacle is what another program's rules do to captured packets, or to what this host is to forward.
type Obstacle struct {
	// Code is a word for the kind: dropped, unmarked, translated or unforwarded.
	Code string
	// Found names the table, the chain and the rule, and what they do.
	Found string
	// Cure is a command line for sh. Of several that would do it is the one that opens least, and that stays if that can be
	// had in one line.
	Cure string
	// Firewalld tells that it is firewalld's, which has an interface of its own for programs.
	Firewalld bool
}

// Way is an interface by which clients' packets come in.
type Way struct {
	Name     string
	Networks []netip.Prefix // connected there
	Uplink   string         // by which their packets leave, if that is known
}

// Obstacles looks for rules of other tables that take away packets which c captures, by following one of each kind through
// them as they are. It is for the time before Apply: our rules then come first among those of their priority. It tells only
// what is certain: a rule that it cannot read is taken for one that lets pass. The table
// filter of iptables-legacy, which is not in nf_tables, is looked at in the same way.
func Obstacles(c Config, ways []Way) ([]Obstacle, error) {
	rules, err := readRuleset()
	if err != nil {
		return nil, unavailable(err)
	}
	rules.chains = slices.DeleteFunc(rules.chains, func(chain *nftables.Chain) bool {
		return chain.Table.Name == c.Table || chain.Table.Name == guardName(c.Table)
	})
	tables := make(map[byte]*legacyTable)
	for _, f := range families() {
		if tables[f.number], err = readLegacy(f.number); err != nil {
			return nil, fmt.Errorf("read the rules of iptables-legacy: %w", err)
		}
	}
	var found []Obstacle
	add := func(o Obstacle) {
		if !slices.ContainsFunc(found, func(other Obstacle) bool { return other.Cure == o.Cure }) {
			found = append(found, o)
		}
	}
	for _, way := range ways {
		// One client that is banned, or one network that nobody is to reach, is no obstacle.
		try := func(p sample, hinders func(sample) (Obstacle, bool)) {
			if o, hindered := hinders(p); hindered {
				if _, again := hinders(c.another(p, way)); again {
					add(o)
				}
			}
		}
		for _, p := range c.samples(way) {
			try(p, func(p sample) (Obstacle, bool) { return (&trial{ruleset: rules, packet: p}).captured(&c, way) })
			try(p, func(p sample) (Obstacle, bool) {
				return (&trial{packet: p}).legacyObstacle(tables[p.family], legacyInput, &c, way)
			})
			if c.Output.captured() {
				p.mark = c.Output.Mark
				try(p, func(p sample) (Obstacle, bool) { return (&trial{ruleset: rules, packet: p}).sent(&c, way) })
			}
		}
		if c.Router && way.Uplink != "" {
			for _, p := range c.direct(way) {
				try(p, func(p sample) (Obstacle, bool) { return (&trial{ruleset: rules, packet: p}).forwarded(way) })
				try(p, func(p sample) (Obstacle, bool) {
					return (&trial{packet: p}).legacyObstacle(tables[p.family], legacyForward, &c, way)
				})
			}
		}
	}
	return found, nil
}

// Destinations of samples, to which nothing is sent: documentation addresses (RFC 5737, RFC 3849), to which only a default route
// leads, and any that are in use, because filters of what is never routed end the others.
var (
	elsewhere4 = [2]netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("151.101.1.1")}
	elsewhere6 = [2]netip.Addr{netip.MustParseAddr("2001:db8:ffff::1"), netip.MustParseAddr("2a04:4e42::1")}
)

// another is the same packet of another client, if its network has one, to another place.
func (c *Config) another(p sample, way Way) sample {
	f, length, elsewhere := families()[0], 4, elsewhere4
	if p.family == unix.NFPROTO_IPV6 {
		f, length, elsewhere = families()[1], 16, elsewhere6
	}
	p.network = slices.Clone(p.network)
	destination := p.network[len(p.network)-length:]
	source := p.network[len(p.network)-2*length : len(p.network)-length]
	copy(destination, elsewhere[1].AsSlice())
	for _, network := range way.Networks {
		// The last is for all hosts in IPv4.
		other := netipx.PrefixLastIP(network).Prev()
		if f.has(other) && network.Contains(other) && slices.ContainsFunc(c.Clients, func(p netip.Prefix) bool { return p.Contains(other) }) {
			copy(source, other.AsSlice())
			break
		}
	}
	return p
}

// samples are packets of clients as the rules hand them on: the first of a TCP flow, a query, and one for each range of captured
// UDP ports.
func (c *Config) samples(way Way) []sample {
	var all []sample
	for _, f := range families() {
		if _, listens := f.listener(c.Listen); !listens {
			continue
		}
		source, known := c.client(f, way)
		if !known {
			continue
		}
		if len(c.Ports) > 0 {
			port := c.Ports[0].First
			if i := slices.IndexFunc(c.Ports, func(r PortRange) bool { return r.First <= 443 && 443 <= r.Last }); i >= 0 {
				port = 443
			}
			all = append(all, newSample(f, way.Name, source, unix.IPPROTO_TCP, port))
		}
		if c.DNS.UDP {
			all = append(all, newSample(f, way.Name, source, unix.IPPROTO_UDP, dnsPort))
		}
		for _, ports := range c.CapturedUDP {
			p := newSample(f, way.Name, source, unix.IPPROTO_UDP, ports.First)
			p.ports = ports
			all = append(all, p)
		}
	}
	for i := range all {
		all[i].mark = c.LAN
		if c.Steered && all[i].protocol == unix.IPPROTO_TCP {
			all[i].connection = c.LAN // as remember leaves it
		}
	}
	return all
}

// direct are packets of clients that are not captured.
func (c *Config) direct(way Way) []sample {
	var all []sample
	for _, f := range families() {
		source, known := c.client(f, way)
		if !known {
			continue
		}
		const port = 33434 // of nothing that is captured, or filtered by its port (traceroute)
		p := newSample(f, way.Name, source, unix.IPPROTO_UDP, port)
		p.outgoing = way.Uplink
		all = append(all, p)
	}
	return all
}

// client is an address that is captured and may come in there.
func (c *Config) client(f family, way Way) (netip.Addr, bool) {
	for _, network := range way.Networks {
		address := network.Addr()
		if !f.has(address) {
			continue
		}
		for range 2 { // the first is no host's, the second is often the router's
			if next := address.Next(); network.Contains(next) {
				address = next
			}
		}
		if slices.ContainsFunc(c.Clients, func(p netip.Prefix) bool { return p.Contains(address) }) {
			return address, true
		}
	}
	return netip.Addr{}, false
}

// newSample is a packet of a client's to some other network.
func newSample(f family, incoming string, source netip.Addr, protocol byte, port uint16) sample {
	p := sample{family: f.number, protocol: protocol, incoming: incoming, ports: PortRange{port, port}}
	switch f.number {
	case unix.NFPROTO_IPV4: // RFC 791, section 3.1
		p.network = append([]byte{4<<4 | 5, 0, 0, 60, 0, 1, 0x40, 0, 64, protocol, 0, 0}, source.AsSlice()...)
		p.network = append(p.network, elsewhere4[0].AsSlice()...)
	default: // RFC 8200, section 3
		p.network = append([]byte{6 << 4, 0, 0, 0, 0, 40, protocol, 64}, source.AsSlice()...)
		p.network = append(p.network, elsewhere6[0].AsSlice()...)
	}
	p.transport = make([]byte, 20)
	binary.BigEndian.PutUint16(p.transport, 40001)
	binary.BigEndian.PutUint16(p.transport[2:], port)
	if protocol == unix.IPPROTO_TCP { // RFC 9293, section 3.1
		const syn = 0x02
		p.transport[12], p.transport[13] = 5<<4, syn
	}
	return p
}

// sent follows a packet of this host's own programs, which goes through the loopback interface once our rules have marked it.
func (t *trial) sent(c *Config, way Way) (Obstacle, bool) {
	mark := t.packet.mark
	t.packet.incoming, t.packet.outgoing = "", way.Uplink
	for _, base := range t.hooked(*nftables.ChainHookOutput, t.packet.family) {
		if *base.Priority < *nftables.ChainPriorityMangle {
			continue
		}
		if t.pass(base); t.packet.mark&c.Mask != mark {
			return t.unmarked(base, mark, c, way), true
		}
	}
	t.packet.incoming, t.packet.outgoing = loopback, ""
	return t.captured(c, way)
}

// captured follows a packet that our rules have marked, from behind them up to its socket.
func (t *trial) captured(c *Config, way Way) (Obstacle, bool) {
	mark := t.packet.mark
	for _, base := range t.hooked(*nftables.ChainHookPrerouting, t.packet.family) {
		if *base.Priority < *nftables.ChainPriorityMangle {
			continue
		}
		switch result := t.pass(base); {
		case result == ended:
			return t.obstacle("dropped", "drops captured packets", base, mark, c, way), true
		case result == rewritten:
			return t.obstacle("translated", "takes captured packets elsewhere", base, mark, c, way), true
		case t.packet.mark&c.Mask != mark:
			return t.unmarked(base, mark, c, way), true
		}
	}
	for _, base := range t.hooked(*nftables.ChainHookInput, t.packet.family) {
		if t.pass(base) == ended {
			return t.obstacle("dropped", "drops captured packets, which are delivered to this host", base, mark, c, way), true
		}
	}
	return Obstacle{}, false
}

// forwarded follows a packet that our rules leave alone.
func (t *trial) forwarded(way Way) (Obstacle, bool) {
	for _, base := range t.hooked(*nftables.ChainHookForward, t.packet.family) {
		if t.pass(base) == ended {
			return Obstacle{
				Code:  "unforwarded",
				Found: t.found("drops what clients send directly, which --gateway is to forward", base),
				Cure:  t.forwardCure(base, way),
			}, true
		}
	}
	return Obstacle{}, false
}

func (t *trial) unmarked(base *nftables.Chain, mark uint32, c *Config, way Way) Obstacle {
	t.where = ""
	return t.obstacle("unmarked", fmt.Sprintf("sets the mark of captured packets to %#x", t.packet.mark), base, mark, c, way)
}

func (t *trial) obstacle(code, what string, base *nftables.Chain, mark uint32, c *Config, way Way) Obstacle {
	return Obstacle{
		Code: code, Found: t.found(what, base), Cure: t.cure(base, mark, c, way),
		Firewalld: t.kind(base) == firewalld && code == "dropped",
	}
}

// found is the proof.
func (t *trial) found(what string, base *nftables.Chain) string {
	where := ""
	if t.where != "" {
		where = " by " + t.where
		if t.chain != base.Name {
			where += " in chain " + t.chain
		}
	}
	family := "IPv4"
	if t.packet.family == unix.NFPROTO_IPV6 {
		family = "IPv6"
	}
	by := "in by " + t.packet.incoming
	if t.packet.incoming == "" {
		by = "of this host's own programs"
	}
	return fmt.Sprintf("nft %s chain %s%s %s (%s, %s)", tableText(base.Table), base.Name, where, what, family, by)
}

// kind is who manages a table, as its names tell.
type kind uint8

const (
	plain   kind = iota
	xtables      // iptables-nft
	ufw
	firewalld
)

func (t *trial) kind(base *nftables.Chain) kind {
	table := base.Table
	switch {
	case table.Family == nftables.TableFamilyINet && table.Name == "firewalld":
		return firewalld
	case table.Family != nftables.TableFamilyIPv4 && table.Family != nftables.TableFamilyIPv6:
		return plain
	case t.ruleset.chain(table, "ufw-before-input") != nil || t.ruleset.chain(table, "ufw6-before-input") != nil:
		return ufw
	case slices.Contains([]string{"filter", "mangle", "nat", "raw", "security"}, table.Name) && strings.ToUpper(base.Name) == base.Name:
		return xtables
	}
	return plain
}

// xtablesCommand is iptables' name for the packet's family.
func (t *trial) xtablesCommand() string {
	if t.packet.family == unix.NFPROTO_IPV6 {
		return "ip6tables-nft"
	}
	return "iptables-nft"
}

// cure lets captured packets pass ahead of what ends them.
func (t *trial) cure(base *nftables.Chain, mark uint32, c *Config, way Way) string {
	switch k := t.kind(base); {
	case k == ufw && base.Name == "INPUT":
		// Not `ufw allow`: what is not for this host's own address is dropped before the rules that makes.
		file, chain := "before.rules", "ufw-before-input"
		if t.packet.family == unix.NFPROTO_IPV6 {
			file, chain = "before6.rules", "ufw6-before-input"
		}
		return fmt.Sprintf("sed -i '/^# End required lines/a -A %s -m mark --mark %#x/%#x -j ACCEPT' /etc/ufw/%s && ufw reload", chain, mark, c.Mask, file)
	case k == firewalld && *base.Hooknum == *nftables.ChainHookInput:
		return fmt.Sprintf("firewall-cmd --permanent --zone=%s --add-rich-rule='%s' && firewall-cmd --reload", t.zone(),
			strings.Join(t.packet.richRules(c, way), "' --add-rich-rule='"))
	case k == xtables || k == ufw:
		return fmt.Sprintf("%s -t %s -I %s -m mark --mark %#x/%#x -j ACCEPT", t.xtablesCommand(), base.Table.Name, base.Name, mark, c.Mask)
	}
	return fmt.Sprintf("nft 'insert rule %s %s meta mark & %#08x == %#08x accept'", strings.TrimPrefix(tableText(base.Table), "table "), base.Name, c.Mask, mark)
}

// zone is firewalld's that ended the packet, by the name of the chain: each zone has one, with further ones for its parts.
func (t *trial) zone() string {
	for _, prefix := range []string{"filter_IN_", "filter_FWD_"} {
		zone, found := strings.CutPrefix(t.chain, prefix)
		if !found || strings.HasPrefix(zone, "policy_") {
			continue
		}
		for _, part := range []string{"_pre", "_log", "_deny", "_allow", "_post"} {
			zone = strings.TrimSuffix(zone, part)
		}
		return zone
	}
	return `"$(firewall-cmd --get-default-zone)"`
}

func (t *trial) forwardCure(base *nftables.Chain, way Way) string {
	switch k := t.kind(base); {
	case k == ufw && base.Name == "FORWARD":
		return "ufw route allow in on " + way.Name
	case k == firewalld:
		const policy = "firewall-cmd --permanent --policy=transproxy"
		// A policy is for interfaces that are in their zone by name, and not because it is the default.
		named := fmt.Sprintf("firewall-cmd --permanent --zone=%s --add-interface=%s", t.zone(), way.Name)
		return named + " && firewall-cmd --permanent --new-policy=transproxy && " + policy + " --add-ingress-zone=" + t.zone() + " && " + policy +
			" --add-egress-zone=ANY && " + policy + " --set-target=ACCEPT && firewall-cmd --reload"
	case k == xtables || k == ufw:
		chain := base.Name
		if t.ruleset.chain(base.Table, "DOCKER-USER") != nil {
			chain = "DOCKER-USER" // what Docker leaves to others
		}
		command := t.xtablesCommand()
		return fmt.Sprintf("%s -I %s -i %s -j ACCEPT && %[1]s -I %[2]s -o %[3]s -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
			command, chain, way.Name)
	}
	chain := strings.TrimPrefix(tableText(base.Table), "table ") + " " + base.Name
	return fmt.Sprintf("nft 'insert rule %s iifname \"%s\" accept; insert rule %[1]s oifname \"%[2]s\" ct state established,related accept'", chain, way.Name)
}

// RichRules are rules of firewalld's (firewalld.richlanguage(5)) that let pass what c captures of what comes in there.
func (c Config) RichRules(way Way) []string {
	var rules []string
	for _, p := range c.samples(way) {
		rules = append(rules, p.richRules(&c, way)...)
	}
	return rules
}

// richRules accept what is captured of the packet's family, protocol and ports, because firewalld knows no marks. It may have
// the uplink in the same zone: so each is for one network of clients. What these say to their own network, this host's
// address there included, is left to the other rules if that network is one alone.
func (p *sample) richRules(c *Config, way Way) []string {
	f := families()[0]
	if p.family == unix.NFPROTO_IPV6 {
		f = families()[1]
	}
	destination, what := "", `protocol value="tcp"`
	if network := f.only(way.Networks); network.IsValid() {
		destination = fmt.Sprintf(` destination not address="%s"`, network)
	}
	if p.protocol == unix.IPPROTO_UDP {
		what = fmt.Sprintf(`port port="%s" protocol="udp"`, p.ports)
	}
	var rules []string
	for _, clients := range c.Clients {
		if f.has(clients.Addr()) {
			rules = append(rules, fmt.Sprintf(`rule family="%s" source address="%s"%s %s accept`, f.proto, clients, destination, what))
		}
	}
	return rules
}

// only is the one network of the family that there is.
func (f family) only(networks []netip.Prefix) netip.Prefix {
	var found []netip.Prefix
	for _, network := range networks {
		if f.has(network.Addr()) {
			found = append(found, network)
		}
	}
	if len(found) != 1 {
		return netip.Prefix{}
	}
	return found[0]
}

// tableText is a table in nft's words.
func tableText(table *nftables.Table) string {
	name := map[nftables.TableFamily]string{
		nftables.TableFamilyINet: "inet", nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6",
	}[table.Family]
	return "table " + cmp.Or(name, fmt.Sprint(table.Family)) + " " + table.Name
}

func interfaceIndex(name string) (uint32, bool) {
	link, err := net.InterfaceByName(name)
	if err != nil {
		return 0, false
	}
	return uint32(link.Index), true
}
