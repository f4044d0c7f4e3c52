package netfilter

import (
	"errors"
	"reflect"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// kernel is what this package asks of nf_tables. Tests put errors between of kernels that they do not run on.
type kernel interface {
	// holder says who has the name of a table.
	holder(name string) (holder, error)
	// instance names a table of ours that a living process owns, or is "".
	instance() (string, error)
	// commit does all of the change or, after an error, nothing.
	commit(change []operation) error
	// intact reports whether the table has the rules, and as many elements of its sets, as t.
	intact(t table) (bool, error)
	// hasSet reports whether a table, there or not, has a set of the name.
	hasSet(table, set string) (bool, error)
	close() error
}

// holder is who has the name of a table.
type holder uint8

const (
	nobody  holder = iota
	left           // ours, and no process owns it
	living         // ours, and a process owns it
	foreign        // not ours
)

// operation is one step of a transaction.
type operation struct {
	verb  verb
	table table
	stale table // of verb put: sets and chains that are to go, there or not
}

type verb uint8

const (
	put    verb = iota // there or not, the table has then exactly the rules and elements described
	create             // it must not be there
	drop               // there or not; needs only the name and owned
)

// puts makes tables of those before, where there were any: sets and chains that are in a table no more are deleted, and sets
// that stay as they are not touched. While elements are replaced, be it by the same ones, a lookup can miss them.
func puts(tables, before []table) []operation {
	var change []operation
	for _, t := range tables {
		o := operation{verb: put, table: t}
		if i := slices.IndexFunc(before, func(b table) bool { return b.name == t.name }); i >= 0 {
			o.stale = before[i].without(t)
			o.table.sets = slices.DeleteFunc(slices.Clone(t.sets), before[i].has)
		}
		change = append(change, o)
	}
	return change
}

// has reports whether the table has a set with the same elements, and some of them: what has none may not be there.
func (t table) has(other set) bool {
	return slices.ContainsFunc(t.sets, func(s set) bool { return len(s.elements) > 0 && reflect.DeepEqual(s, other) })
}

// without returns the sets and chains whose names other has not.
func (t table) without(other table) table {
	return table{
		sets: slices.DeleteFunc(slices.Clone(t.sets), func(s set) bool {
			return slices.ContainsFunc(other.sets, func(o set) bool { return o.name == s.name })
		}),
		chains: slices.DeleteFunc(slices.Clone(t.chains), func(c chain) bool {
			return slices.ContainsFunc(other.chains, func(o chain) bool { return o.name == c.name })
		}),
	}
}

// connection is the netlink socket for everything: the kernel knows an owner by its socket. The library makes the socket's
// buffers as large as a transaction needs.
type connection struct{ netlink *nftables.Conn }

func dial() (*connection, error) {
	netlink, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, err
	}
	return &connection{netlink}, nil
}

func (k *connection) close() error { return k.netlink.CloseLasting() }

// library returns the table as the library has it.
func (t table) library() *nftables.Table {
	header := &nftables.Table{Family: nftables.TableFamilyINet, Name: t.name}
	if t.owned {
		header.Flags = nftables.TableFlagOwner
	}
	return header
}

func (k *connection) holder(name string) (holder, error) {
	tables, err := k.netlink.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nobody, err
	}
	i := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == name })
	if i < 0 {
		return nobody, nil
	}
	return k.holderOf(tables[i])
}

func (k *connection) instance() (string, error) {
	tables, err := k.netlink.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return "", err
	}
	for _, table := range tables {
		holder, err := k.holderOf(table)
		if err != nil {
			return "", err
		}
		if holder == living {
			return table.Name, nil
		}
	}
	return "", nil
}

// holderOf is the holder of a table that is there, unless it has gone since.
func (k *connection) holderOf(table *nftables.Table) (holder, error) {
	sets, err := k.netlink.GetSets(table)
	if errno := unix.Errno(0); errors.As(err, &errno) {
		return nobody, absent(err)
	}
	// What the library cannot read are no sets of ours.
	ours := err == nil && slices.ContainsFunc(sets, func(s *nftables.Set) bool {
		return strings.HasPrefix(s.Comment, marker)
	})
	switch {
	case !ours:
		return foreign, nil
	case table.Flags&nftables.TableFlagOwner != 0:
		return living, nil
	}
	return left, nil
}

func (k *connection) commit(change []operation) error {
	for _, o := range change {
		table := o.table.library()
		if o.verb == create {
			k.netlink.CreateTable(table)
		} else {
			k.netlink.AddTable(table)
		}
		if o.verb == drop {
			k.netlink.DelTable(table)
			continue
		}
		k.fill(table, o.table)
		k.remove(table, o.stale)
	}
	return k.netlink.Flush()
}

// fill replaces what is in the sets and chains. They are flushed rather than made anew, so that no packet meets a hook
// between two chains. What goes wrong here is told by the library's Flush.
func (k *connection) fill(table *nftables.Table, t table) {
	for _, s := range t.sets {
		set := s.in(table)
		_ = k.netlink.AddSet(set, nil)
		k.netlink.FlushSet(set)
		_ = k.netlink.SetAddElements(set, s.keys())
	}
	chains := make([]*nftables.Chain, len(t.chains))
	for i, c := range t.chains {
		chains[i] = k.netlink.AddChain(c.in(table))
		k.netlink.FlushChain(chains[i])
	}
	for i, c := range t.chains {
		for _, r := range c.rules {
			rule := &nftables.Rule{Table: table, Chain: chains[i], UserData: r.userData()}
			for _, part := range r.clauses {
				rule.Exprs = append(rule.Exprs, part.expressions...)
			}
			k.netlink.AddRule(rule)
		}
	}
}

// remove deletes sets and chains that no rule refers to any more. They are added first: what is not there could not be
// deleted.
func (k *connection) remove(table *nftables.Table, stale table) {
	for _, c := range stale.chains {
		k.netlink.DelChain(k.netlink.AddChain(c.in(table)))
	}
	for _, s := range stale.sets {
		set := s.in(table)
		_ = k.netlink.AddSet(set, nil) // Flush tells what goes wrong
		k.netlink.DelSet(set)
	}
}

// in returns the chain as the library has it.
func (c chain) in(table *nftables.Table) *nftables.Chain {
	chain := &nftables.Chain{Table: table, Name: c.name}
	if c.hook != nil {
		policy := nftables.ChainPolicyAccept
		chain.Type, chain.Policy = nftables.ChainTypeFilter, &policy
		if c.hook.kind != "" {
			chain.Type = c.hook.kind
		}
		chain.Hooknum, chain.Priority = c.hook.number, c.hook.priority
	}
	return chain
}

// userData is the comment as nft(8) writes it.
func (r rule) userData() []byte {
	return userdata.AppendString(nil, userdata.TypeComment, r.comment)
}

func (k *connection) intact(t table) (bool, error) {
	table := t.library()
	for _, c := range t.chains {
		rules, err := k.netlink.GetRules(table, &nftables.Chain{Name: c.name})
		if err != nil {
			return false, absent(err)
		}
		// The library does not read all expressions back: a rule is known by its comment.
		if !slices.EqualFunc(c.rules, rules, func(r rule, found *nftables.Rule) bool {
			return string(r.userData()) == string(found.UserData)
		}) {
			return false, nil
		}
	}
	for _, s := range t.sets {
		elements, err := k.netlink.GetSetElements(s.in(table))
		if err != nil {
			return false, absent(err)
		}
		if len(elements) != len(s.keys()) {
			return false, nil
		}
	}
	return true, nil
}

func (k *connection) hasSet(name, set string) (bool, error) {
	_, err := k.netlink.GetSetByName(table{name: name}.library(), set)
	if err != nil {
		return false, absent(err)
	}
	return true, nil
}

// absent is nil if err says that something is not there.
func absent(err error) error {
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
