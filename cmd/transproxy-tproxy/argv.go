package main

import (
	"strconv"
	"strings"
	"unsafe"
)

// takeArguments returns a copy of the arguments and overwrites the password of
// every URL in the originals, which the kernel shows to all users of the host in
// /proc/PID/cmdline (proc_pid_cmdline(5)).
//
// The Go runtime makes os.Args of the very bytes that the kernel passed, so that
// writing through them is what changes the listing; those bytes are on the
// process's stack and writable.
func takeArguments(arguments []string) []string {
	taken := make([]string, len(arguments))
	for i, argument := range arguments {
		taken[i] = strings.Clone(argument)
		if start, end, found := password(argument); found {
			original := unsafe.Slice(unsafe.StringData(argument), len(argument))
			for at := start; at < end; at++ {
				original[at] = '*'
			}
		}
	}
	return taken
}

// password finds the part between the colon and the last @ of a URL's user
// information, with or without a scheme in front.
func password(argument string) (start, end int, found bool) {
	if scheme := strings.Index(argument, "://"); scheme >= 0 {
		start = scheme + len("://")
	} else if equals := strings.IndexByte(argument, '='); equals >= 0 && strings.HasPrefix(argument, "-") {
		start = equals + 1
	}
	end = strings.LastIndexByte(argument, '@')
	if end < start {
		return 0, 0, false
	}
	colon := strings.IndexByte(argument[start:end], ':')
	if colon < 0 {
		return 0, 0, false
	}
	return start + colon + 1, end, true
}

// redact takes the passwords of all arguments out of a text, as far as they were
// quoted there. Any argument may be in a message about the command line, and a URL
// may stand where none belongs.
func redact(text string, arguments []string) string {
	for _, argument := range arguments {
		if start, end, found := password(argument); found && start < end {
			quoted := strconv.Quote(argument[start:end])
			text = strings.ReplaceAll(text, argument[start:end], "***")
			text = strings.ReplaceAll(text, quoted[1:len(quoted)-1], "***")
		}
	}
	return text
}
