package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"
)

// The yardstick for what is not in the cache: a goroutine a query, and in each a
// tunnel of its own through the proxy.
const yardstickName = "yardstick"

// yardstick answers queries until receiving fails, and returns why.
func yardstick() error {
	conn, err := net.ListenPacket("udp4", resolverAddress.String())
	if err != nil {
		return err
	}
	for {
		query := make([]byte, 4096)
		length, client, err := conn.ReadFrom(query)
		if err != nil {
			return err
		}
		go func() {
			if message, err := askOnce(query[:length]); err == nil {
				conn.WriteTo(message, client)
			}
		}()
	}
}

// askOnce opens a tunnel, asks a query in it and closes it.
func askOnce(query []byte) ([]byte, error) {
	dialer := net.Dialer{Timeout: 5 * time.Second}
	dialer.SetMultipathTCP(false)
	conn, err := dialer.Dial("tcp4", proxyAddress.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", upstreamAddress, upstreamAddress); err != nil {
		return nil, err
	}
	if err := readHead(conn); err != nil {
		return nil, err
	}
	message := binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(query)), uint16(len(query)))
	if _, err := conn.Write(append(message, query...)); err != nil {
		return nil, err
	}
	return readFrame(conn, make([]byte, 4096))
}

// readHead reads the head of a request or of an answer without a body, behind which
// the other side sends nothing before it is answered.
func readHead(conn net.Conn) error {
	var head [2048]byte
	for read := 0; !strings.HasSuffix(string(head[:read]), "\r\n\r\n"); {
		if read == len(head) {
			return errors.New("the head is too long")
		}
		got, err := conn.Read(head[read:])
		if err != nil {
			return err
		}
		read += got
	}
	return nil
}
