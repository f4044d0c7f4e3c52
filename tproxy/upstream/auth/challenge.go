package auth

import "strings"

const (
	// maxChallenges bounds the challenges that are kept of one answer; 13 schemes are
	// registered with IANA, of which a proxy offers up to four, Digest perhaps thrice.
	maxChallenges = 16

	// maxParams bounds the parameters of one; Digest has ten.
	maxParams = 16

	// maxScheme bounds the name of a scheme in bytes; the longest that is registered,
	// "SCRAM-SHA-256", has 13.
	maxScheme = 32
)

// Challenge is one of those in a Proxy-Authenticate field (RFC 9110 section 11.3).
type Challenge struct {
	Scheme string  // as the proxy writes it
	Token  string  // what NTLM and Negotiate send (token68); empty for none
	Params []Param // what Basic and Digest send
}

// Param is a parameter of a challenge.
type Param struct {
	Name  string // as the proxy writes it
	Value string // without quotes and escapes
}

// Is reports whether the challenge is of a scheme.
func (c *Challenge) Is(scheme string) bool { return strings.EqualFold(c.Scheme, scheme) }

// Param returns the value of a parameter, the first of that name; empty for none.
func (c *Challenge) Param(name string) string {
	for _, p := range c.Params {
		if strings.EqualFold(p.Name, name) {
			return p.Value
		}
	}
	return ""
}

// AppendChallenges appends the challenges in the value of one Proxy-Authenticate field,
// which may come several times, to those of the fields before. What is not understood is
// left out, and so is what goes beyond 16 challenges or 16 parameters: a proxy is asked
// by what is left.
func AppendChallenges(to []Challenge, value []byte) []Challenge {
	own := len(to) // parameters at the start of a field belong to no challenge
	for len(value) > 0 {
		var element string
		element, value = cutElement(value)
		scheme, rest, starts := cutScheme(element)
		switch {
		case starts && len(to) == maxChallenges:
			return to
		case starts:
			to = append(to, Challenge{Scheme: scheme})
			c := &to[len(to)-1]
			if param, ok := parseParam(rest); ok {
				c.Params = append(c.Params, param)
			} else if isToken68(rest) {
				c.Token = rest
			}
		case len(to) > own:
			c := &to[len(to)-1]
			if param, ok := parseParam(element); ok && len(c.Params) < maxParams {
				c.Params = append(c.Params, param)
			}
		}
	}
	return to
}

// cutElement splits a comma-separated list after its first element. A comma in a
// quoted string separates nothing (RFC 9110 sections 5.6.1 and 5.6.4).
func cutElement(list []byte) (element string, rest []byte) {
	quoted := false
	for i := 0; i < len(list); i++ {
		switch {
		case list[i] == '"':
			quoted = !quoted
		case quoted && list[i] == '\\':
			i++
		case !quoted && list[i] == ',':
			return strings.Trim(string(list[:i]), " \t"), list[i+1:]
		}
	}
	return strings.Trim(string(list), " \t"), nil
}

// cutScheme returns the scheme if a list element starts a challenge, and what stands
// behind it. An element that does not is a further parameter of the challenge before
// (both lists use the comma; a parameter is a token that an equals sign follows).
func cutScheme(element string) (scheme, rest string, starts bool) {
	end := tokenEnd(element)
	rest = strings.TrimLeft(element[end:], " \t")
	parameter := strings.HasPrefix(rest, "=")
	glued := rest != "" && len(rest) == len(element)-end // to something that is no token
	if end == 0 || end > maxScheme || parameter || glued {
		return "", "", false
	}
	return element[:end], rest, true
}

// parseParam reads name = value, the value a token or a quoted string.
func parseParam(text string) (Param, bool) {
	end := tokenEnd(text)
	value, found := strings.CutPrefix(strings.TrimLeft(text[end:], " \t"), "=")
	if end == 0 || !found {
		return Param{}, false
	}
	name := text[:end]
	value = strings.TrimLeft(value, " \t")
	if quoted, found := strings.CutPrefix(value, `"`); found {
		value, closed := unquote(quoted)
		return Param{name, value}, closed
	}
	return Param{name, value}, value != "" && tokenEnd(value) == len(value)
}

// unquote returns a quoted string, whose opening quote is taken off, without its escapes
// (RFC 9110 section 5.6.4). Nothing may follow it.
func unquote(text string) (value string, closed bool) {
	var unescaped strings.Builder
	for i := 0; i < len(text); i++ {
		switch {
		case text[i] == '"':
			return unescaped.String(), i == len(text)-1
		case text[i] == '\\' && i+1 < len(text):
			i++
		}
		unescaped.WriteByte(text[i])
	}
	return "", false
}

// quote returns a quoted string with the escapes that it needs.
func quote(text string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(text) + `"`
}

// isToken68 reports whether text is what some schemes send in place of parameters (RFC
// 9110 section 11.2).
func isToken68(text string) bool {
	body := strings.TrimRight(text, "=")
	for i := range len(body) {
		if !isAlphanumeric(body[i]) && strings.IndexByte("-._~+/", body[i]) < 0 {
			return false
		}
	}
	return body != ""
}

// tokenEnd returns how long the token is that text begins with.
func tokenEnd(text string) int {
	for i := range len(text) {
		if !isAlphanumeric(text[i]) && strings.IndexByte("!#$%&'*+-.^_`|~", text[i]) < 0 {
			return i
		}
	}
	return len(text)
}

func isAlphanumeric(c byte) bool {
	return 'a' <= c|0x20 && c|0x20 <= 'z' || '0' <= c && c <= '9'
}
