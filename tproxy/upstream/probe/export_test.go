package probe

// Judge is the verdict on a name server's answer.
func Judge(answer []byte) (Verdict, string) {
	got := judge(answer)
	return got.verdict, got.proof
}
