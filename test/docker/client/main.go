// Command client is the one program inside the containers of the Docker tests: a
// client and a server that know nothing of any gateway. Names it resolves as every
// program does, by /etc/hosts and /etc/resolv.conf; authorities that it trusts are those
// of the container's system.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/miekg/dns"
)

const usage = `client fetch URL...                      print what is there
client ask ADDRESS:PORT                  print the answer to a datagram
client serve NAME                        be a server: HTTP on port 80, an echo on UDP port 443
client resolver ADDRESS SERVER NAME=IP...  be Docker's embedded DNS server at ADDRESS`

// patience bounds a fetch with all look-ups of its name, and an answer to a datagram.
// What is black-holed must fail a test soon; what works takes milliseconds.
const patience = 5 * time.Second

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	switch {
	case len(arguments) >= 2 && arguments[0] == "fetch":
		for _, url := range arguments[1:] {
			if err := fetch(url); err != nil {
				return err
			}
		}
		return nil
	case len(arguments) == 2 && arguments[0] == "ask":
		return ask(arguments[1])
	case len(arguments) == 2 && arguments[0] == "serve":
		return serve(arguments[1])
	case len(arguments) >= 3 && arguments[0] == "resolver":
		return resolve(arguments[1], arguments[2], arguments[3:])
	}
	return errors.New(usage)
}

// fetch prints the body of an answer. As every program would, it uses a proxy that its
// environment names: the tests hold that there is none.
func fetch(url string) error {
	client := http.Client{Timeout: patience}
	response, err := client.Get(url)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("get %s: %s", url, response.Status)
	}
	_, err = io.Copy(os.Stdout, response.Body)
	return err
}

// ask sends a datagram and prints the answer. A refusal is an error at once.
func ask(address string) error {
	conn, err := net.Dial("udp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	if _, err := conn.Write([]byte("hello")); err != nil {
		return err
	}
	buffer := make([]byte, 1500)
	n, err := conn.Read(buffer)
	if err == nil {
		fmt.Printf("%s\n", buffer[:n])
	}
	return err
}

// serve tells every client which name it asked for, and the address that it has here.
func serve(name string) error {
	packets, err := net.ListenPacket("udp", ":443")
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", ":80")
	if err != nil {
		return err
	}
	ended := make(chan error, 2)
	go func() { ended <- echo(name, packets) }()
	go func() {
		ended <- http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			client, _ := netip.ParseAddrPort(r.RemoteAddr)
			fmt.Fprintf(w, "%s serves %s to %s\n", name, r.Host, client.Addr().Unmap())
		}))
	}()
	fmt.Println("ready")
	return <-ended
}

func echo(name string, packets net.PacketConn) error {
	buffer := make([]byte, 1500)
	for {
		n, client, err := packets.ReadFrom(buffer)
		if err != nil {
			return err
		}
		packets.WriteTo(fmt.Appendf(nil, "%s hears %s", name, buffer[:n]), client)
	}
}

// resolve does what Docker's embedded server does: it answers for the containers of the
// network, and asks the server for all other names, over the transport of the question
// and from the container's own network.
func resolve(address, server string, known []string) error {
	hosts := make(map[string]string)
	for _, entry := range known {
		name, ip, _ := strings.Cut(entry, "=")
		hosts[dns.Fqdn(name)] = ip
	}
	ended := make(chan error, 2)
	for _, transport := range []string{"udp", "tcp"} {
		handler := dns.HandlerFunc(func(w dns.ResponseWriter, question *dns.Msg) {
			w.WriteMsg(answer(question, hosts, transport, server))
		})
		go func() {
			ended <- (&dns.Server{Addr: address, Net: transport, Handler: handler}).ListenAndServe()
		}()
	}
	fmt.Println("ready")
	return <-ended
}

func answer(question *dns.Msg, hosts map[string]string, transport, server string) *dns.Msg {
	reply := new(dns.Msg).SetReply(question)
	if ip, ok := hosts[strings.ToLower(question.Question[0].Name)]; ok {
		if question.Question[0].Qtype == dns.TypeA {
			record, _ := dns.NewRR(fmt.Sprintf("%s 600 A %s", question.Question[0].Name, ip))
			reply.Answer = append(reply.Answer, record)
		}
		return reply
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	client := dns.Client{Net: transport, Timeout: patience}
	found, _, err := client.ExchangeContext(ctx, question, net.JoinHostPort(server, "53"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		reply.Rcode = dns.RcodeServerFailure
	}
	return cmp.Or(found, reply)
}
