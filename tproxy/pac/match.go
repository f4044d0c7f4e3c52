//go:build !nopac

package pac

// shellMatch is shExpMatch: * stands for any run of characters, ? for one, every
// other character for itself. It takes time in proportion to the product of the
// lengths, whatever the pattern; browsers make a regular expression of it, which
// can take exponential time.
func shellMatch(text, pattern []rune) bool {
	star, from := -1, 0 // the last star met, and where the text behind it was tried
	i, j := 0, 0
	for i < len(text) {
		switch {
		case j < len(pattern) && pattern[j] == '*':
			star, from = j, i
			j++
		case j < len(pattern) && (pattern[j] == '?' || pattern[j] == text[i]):
			i++
			j++
		case star >= 0:
			from++
			i, j = from, star+1
		default:
			return false
		}
	}
	for j < len(pattern) && pattern[j] == '*' {
		j++
	}
	return j == len(pattern)
}
