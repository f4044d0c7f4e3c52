package exchange

import (
	"net/http"
)

// ReadHTTP is readHTTP.
func ReadHTTP(response *http.Response, query []byte) ([]byte, error) {
	return readHTTP(response, query)
}

// Disguise returns a query as it goes out over UDP.
func Disguise(query []byte) (disguised []byte, err error) {
	end, err := checkQuery(query)
	if err != nil {
		return nil, err
	}
	disguised = append([]byte(nil), query...)
	disguise(disguised, end)
	return disguised, nil
}

// Reveal returns what is made of an answer to a disguised query, ok if it is one.
func Reveal(answer, disguised, query []byte) (revealed []byte, ok bool) {
	end, err := checkQuery(query)
	if err != nil || len(answer) < headerSize || !answers(answer, disguised, end) {
		return nil, false
	}
	last, err := walk(answer, end, nil)
	if err != nil {
		return nil, false
	}
	answer = answer[:last]
	reveal(answer, query, end)
	return answer, true
}
