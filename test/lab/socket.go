package lab

import (
	"io"
	"net"
	"net/netip"
	"sync"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// SocketFront listens on a unix socket before a stand-in. The zero value is ready for Start.
type SocketFront struct{ servers servers }

// Start listens on a socket, and passes on to an address of the namespace.
func (f *SocketFront) Start(path string, ns *netns.NS, to netip.AddrPort) error {
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	f.servers.accept(listener, func(client net.Conn) {
		var server net.Conn
		err := ns.Do(func() (err error) {
			server, err = net.Dial("tcp", to.String())
			return err
		})
		if err != nil {
			return
		}
		defer server.Close()
		var up sync.WaitGroup
		up.Go(func() {
			io.Copy(server, client)
			server.(*net.TCPConn).CloseWrite()
		})
		io.Copy(client, server)
		client.(*net.UnixConn).CloseWrite()
		up.Wait()
	})
	return nil
}

// Close ends it, and removes the socket.
func (f *SocketFront) Close() { f.servers.close() }
