// Program quic is a QUIC server and client (RFC 9000) for the tests against real programs.
// It is a module of its own, so that the product does not get what it needs.
//
//	quic serve ADDRESS       sends back what comes on each stream
//	quic echo ADDRESS BYTES  has so many bytes sent back and prints their number
package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"strconv"
	"time"

	"github.com/quic-go/quic-go"
)

// protocol is the one that both sides agree on (ALPN), which QUIC demands.
const protocol = "echo"

// limit bounds a client's whole run.
const limit = 20 * time.Second

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	switch {
	case len(arguments) == 2 && arguments[0] == "serve":
		return serve(arguments[1])
	case len(arguments) == 3 && arguments[0] == "echo":
		size, err := strconv.Atoi(arguments[2])
		if err != nil {
			return err
		}
		return echo(arguments[1], size)
	}
	return errors.New("use: quic serve ADDRESS, or quic echo ADDRESS BYTES")
}

func serve(address string) error {
	certificate, err := selfSigned()
	if err != nil {
		return err
	}
	listener, err := quic.ListenAddr(address, &tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: []string{protocol}}, nil)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		conn, err := listener.Accept(context.Background())
		if err != nil {
			return err
		}
		go func() {
			for {
				stream, err := conn.AcceptStream(context.Background())
				if err != nil {
					return
				}
				go func() {
					io.Copy(stream, stream)
					stream.Close()
				}()
			}
		}()
	}
}

func echo(address string, size int) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	began := time.Now()
	// The server's certificate is its own word; who it is is not what is tested.
	conn, err := quic.DialAddr(ctx, address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{protocol}}, nil)
	if err != nil {
		return fmt.Errorf("after %v: %w", time.Since(began).Round(time.Millisecond), err)
	}
	shaken := time.Since(began)
	defer conn.CloseWithError(0, "")
	stream, err := conn.OpenStreamSync(ctx)
	if err != nil {
		return err
	}
	said := make([]byte, size)
	rand.Read(said)
	go func() {
		stream.Write(said)
		stream.Close()
	}()
	heard, err := io.ReadAll(stream)
	if err != nil {
		return err
	}
	if !bytes.Equal(heard, said) {
		return fmt.Errorf("%d bytes came back and not the same %d", len(heard), size)
	}
	fmt.Printf("handshake %v, %d bytes in %v\n", shaken, len(heard), time.Since(began))
	return nil
}

func selfSigned() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"origin.test"}}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	return tls.Certificate{Certificate: [][]byte{certificate}, PrivateKey: key}, err
}
