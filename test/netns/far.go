package netns

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Far is a cable on which every packet travels for a while: the kernel of a test machine
// need not have netem. It carries IP packets and no frames (a TUN device at each end,
// Documentation/networking/tuntap.rst).
type Far struct {
	ends    [2]*os.File
	running sync.WaitGroup
}

// farQueue bounds the packets under way in a direction: 4,096 of them in 10 ms are 600 MB/s.
const farQueue = 4096

// ConnectFar lays such a cable between a's interface aName and b's interface bName, both
// up. Addresses on them need a route to the other side as a prefix of their own. The caller
// closes it.
func ConnectFar(a *NS, aName string, b *NS, bName string, delay time.Duration) (*Far, error) {
	f := new(Far)
	for i, end := range []struct {
		ns   *NS
		name string
	}{{a, aName}, {b, bName}} {
		err := end.ns.Do(func() (err error) {
			f.ends[i], err = openTUN(end.name)
			return err
		})
		if err == nil {
			err = end.ns.Up(end.name)
		}
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("lay a long cable: %w", err)
		}
	}
	for i := range f.ends {
		f.running.Go(func() { carryFar(f.ends[1-i], f.ends[i], delay) })
	}
	return f, nil
}

// Close cuts the cable; the interfaces are gone.
func (f *Far) Close() error {
	var failure error
	for _, end := range f.ends {
		if end != nil {
			failure = errors.Join(failure, end.Close())
		}
	}
	f.running.Wait()
	return failure
}

// openTUN makes the device in the namespace of the calling thread.
func openTUN(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(request)))
		if errno != 0 {
			err = fmt.Errorf("make the device %s: %w", name, errno)
		}
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// packet is one under way.
type packet struct {
	bytes []byte
	due   time.Time
}

// carryFar takes packets from one end to the other until the ends are closed.
func carryFar(to, from *os.File, delay time.Duration) {
	travelling := make(chan packet, farQueue)
	var arriving sync.WaitGroup
	arriving.Go(func() {
		for packet := range travelling {
			time.Sleep(time.Until(packet.due))
			to.Write(packet.bytes) // a packet that cannot arrive is lost, as on any cable
		}
	})
	defer arriving.Wait()
	defer close(travelling)
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		if err != nil {
			return
		}
		travelling <- packet{append([]byte(nil), buffer[:n]...), time.Now().Add(delay)}
	}
}
