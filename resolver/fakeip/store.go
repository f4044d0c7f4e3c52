package fakeip

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	// storeMode keeps other users from the names that people looked up.
	storeMode = 0o600

	// nextSuffix is of the file that is to replace the store. There is one name
	// for it only, so that killed processes leave at most one behind.
	nextSuffix = ".new"
)

var (
	errInUse      = errors.New("another process uses it")
	errNotRegular = errors.New("not a regular file")
)

// store is a file to which lines are appended and which is replaced as a whole.
// It is locked (flock(2)) against other processes; the lock ends with them.
type store struct {
	path string // of the file itself, not of a link to it
	file *os.File
	size int64 // bytes of whole lines

	lines  int  // in the file, beside the header
	behind bool // lines are missing in the file: it is to be replaced, not appended to
}

// openStore opens and locks a store. If there is none, the file is an empty one.
func openStore(path string) (*store, error) {
	// A link is followed, or replacing the file would put a file in its place.
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path = target
	}
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		return nil, errNotRegular
	}
	for {
		file, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE, storeMode)
		if err != nil {
			return nil, cause(err)
		}
		if err := lock(file); err != nil {
			file.Close()
			return nil, err
		}
		if same(file, path) {
			return &store{path: path, file: file}, nil
		}
		// Its owner has replaced it in between.
		file.Close()
	}
}

// lock takes the lock of a file, which closing it releases.
func lock(file *os.File) error {
	err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return errInUse
	}
	return os.NewSyscallError("flock", err)
}

// same reports whether a path still leads to a file.
func same(file *os.File, path string) bool {
	opened, err := file.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(path)
	return err == nil && os.SameFile(opened, there)
}

// append appends lines. After an error the file holds only whole lines if it
// could be cut back, and is not appended to any more.
func (s *store) append(text []byte, lines int) error {
	n, err := s.file.Write(text)
	if err != nil {
		s.behind = true
		if n > 0 {
			// The reader drops part of a line as well.
			err = errors.Join(err, s.file.Truncate(s.size))
		}
		return err
	}
	s.size += int64(len(text))
	s.lines += lines
	return nil
}

// prepare writes lines to a file that can replace the store, and has them on the
// disk: the rename could be there before them otherwise.
func (s *store) prepare(lines iter.Seq[[]byte]) (*os.File, error) {
	path := s.path + nextSuffix
	// O_EXCL follows no link that somebody else put there.
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE|os.O_EXCL, storeMode)
	if err != nil {
		return nil, err
	}
	err = lock(file)
	if err == nil {
		buffer := bufio.NewWriterSize(file, 64<<10)
		for line := range lines {
			buffer.Write(line) // Flush tells the error
		}
		err = buffer.Flush()
	}
	if err == nil {
		err = file.Sync()
	}
	if err != nil {
		s.abandon(file)
		return nil, err
	}
	return file, nil
}

// replace adds to a prepared file what was appended to the store from an offset
// on, and puts it in the place of the store, whose lines are then so many. The
// file is the store's, or closed and removed after an error.
func (s *store) replace(next *os.File, from int64, lines int) error {
	_, err := io.Copy(next, io.NewSectionReader(s.file, from, s.size-from))
	var size int64
	if err == nil {
		size, err = next.Seek(0, io.SeekEnd)
	}
	if err == nil {
		err = os.Rename(next.Name(), s.path)
	}
	if err != nil {
		s.abandon(next)
		return err
	}
	s.file.Close()
	s.file, s.size, s.lines, s.behind = next, size, lines, false
	return nil
}

// abandon removes a file that is not to replace the store.
func (s *store) abandon(next *os.File) {
	next.Close()
	os.Remove(s.path + nextSuffix)
}

// close releases the store.
func (s *store) close() error { return s.file.Close() }

// cause takes the path off an error that is going to be told with it.
func cause(err error) error {
	var path *fs.PathError
	var link *os.LinkError
	switch {
	case errors.As(err, &path):
		return fmt.Errorf("%s: %w", path.Op, path.Err)
	case errors.As(err, &link):
		return fmt.Errorf("%s: %w", link.Op, link.Err)
	}
	return err
}
