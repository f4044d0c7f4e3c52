//go:build !nopac

package pac

import (
	"strings"
	"testing"
	"time"
)

func TestCalendar(t *testing.T) {
	zone := time.FixedZone("", 2*60*60)
	functions := map[string]func(time.Time, []string) bool{"weekday": weekdayRange, "date": dateRange, "time": timeRange}
	for _, test := range []struct {
		now, call string
		want      bool
	}{
		// 2026-11-23 is a Monday.
		{"2026-11-23 12:00:00", "weekday MON", true},
		{"2026-11-23 12:00:00", "weekday TUE", false},
		{"2026-11-23 12:00:00", "weekday MON FRI", true},
		{"2026-11-22 12:00:00", "weekday MON FRI", false},
		{"2026-11-23 12:00:00", "weekday FRI MON", true},
		{"2026-11-24 12:00:00", "weekday FRI MON", false},
		{"2026-11-23 01:00:00", "weekday MON GMT", false}, // Sunday, 23:00 UTC
		{"2026-11-23 01:00:00", "weekday SUN GMT", true},
		{"2026-11-23 12:00:00", "weekday", false},
		{"2026-11-23 12:00:00", "weekday GMT", false},
		{"2026-11-23 12:00:00", "weekday MON TUE WED", false},
		{"2026-11-23 12:00:00", "weekday mon", false},

		{"2026-11-23 12:59:59", "time 12", true},
		{"2026-11-23 13:00:00", "time 12", false},
		{"2026-11-23 09:00:00", "time 9 17", true},
		{"2026-11-23 17:59:59", "time 9 17", true},
		{"2026-11-23 18:00:00", "time 9 17", false},
		{"2026-11-23 23:00:00", "time 22 6", true},
		{"2026-11-23 07:00:00", "time 22 6", false},
		{"2026-11-23 08:29:59", "time 8 30 17 15", false},
		{"2026-11-23 08:30:00", "time 8 30 17 15", true},
		{"2026-11-23 17:15:59", "time 8 30 17 15", true},
		{"2026-11-23 17:16:00", "time 8 30 17 15", false},
		{"2026-11-23 00:00:30", "time 0 0 0 0 0 30", true},
		{"2026-11-23 00:00:31", "time 0 0 0 0 0 30", false},
		{"2026-11-23 12:00:00", "time 10 GMT", true},
		{"2026-11-23 12:00:00", "time", false},
		{"2026-11-23 12:00:00", "time noon", false},
		{"2026-11-23 12:00:00", "time 1 2 3", false},

		{"2026-11-23 12:00:00", "date 23", true},
		{"2026-11-23 12:00:00", "date 24", false},
		{"2026-11-23 12:00:00", "date NOV", true},
		{"2026-11-23 12:00:00", "date 2026", true},
		{"2026-11-23 12:00:00", "date 1 22", false},
		{"2026-11-23 12:00:00", "date 20 25", true},
		{"2026-11-23 12:00:00", "date OCT DEC", true},
		{"2026-11-23 12:00:00", "date NOV FEB", true},
		{"2026-06-23 12:00:00", "date NOV FEB", false},
		{"2026-11-23 12:00:00", "date 2025 2026", true},
		{"2026-11-23 12:00:00", "date 24 NOV 1 DEC", false},
		{"2026-11-24 12:00:00", "date 24 NOV 1 DEC", true},
		{"2026-01-05 12:00:00", "date 20 DEC 6 JAN", true},
		{"2026-11-23 12:00:00", "date OCT 2025 MAR 2026", false},
		{"2026-03-31 12:00:00", "date OCT 2025 MAR 2026", true},
		{"2026-11-23 12:00:00", "date 1 JUN 2026 23 NOV 2026", true},
		{"2026-11-24 12:00:00", "date 1 JUN 2026 23 NOV 2026", false},
		{"2026-11-23 01:00:00", "date 22 GMT", true},
		{"2026-11-23 12:00:00", "date 23 NOV", false}, // no range: a day and a month
		{"2026-11-23 12:00:00", "date 0", false},
		{"2026-11-23 12:00:00", "date x", false},
		{"2026-11-23 12:00:00", "date", false},
		{"2026-11-23 12:00:00", "date 1 2 3", false},
	} {
		now, err := time.ParseInLocation(time.DateTime, test.now, zone)
		if err != nil {
			t.Fatal(err)
		}
		words := strings.Fields(test.call)
		if got := functions[words[0]](now, words[1:]); got != test.want {
			t.Errorf("%s: %sRange(%s) = %v", test.now, words[0], strings.Join(words[1:], ", "), got)
		}
	}
}
