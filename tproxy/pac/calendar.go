//go:build !nopac

package pac

import (
	"slices"
	"strconv"
	"strings"
	"time"
)

var (
	weekdays = []string{"SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"}
	months   = []string{"JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"}
)

// inZone takes a last argument "GMT" off, which puts the time into UTC.
func inZone(now time.Time, arguments []string) (time.Time, []string) {
	if last := len(arguments) - 1; last >= 0 && arguments[last] == "GMT" {
		return now.UTC(), arguments[:last]
	}
	return now, arguments
}

// within tells whether now lies from first to last, both included; a first behind
// the last means the range that runs through the end of the year, week or day.
// All are lists of numbers, the most significant first.
func within(now, first, last []int) bool {
	if slices.Compare(first, last) <= 0 {
		return slices.Compare(first, now) <= 0 && slices.Compare(now, last) <= 0
	}
	return slices.Compare(first, now) <= 0 || slices.Compare(now, last) <= 0
}

// weekdayRange is the script's function: weekdayRange(first[, last][, "GMT"]).
// What it cannot read is never in the range, as in browsers.
func weekdayRange(now time.Time, arguments []string) bool {
	now, arguments = inZone(now, arguments)
	if len(arguments) < 1 || len(arguments) > 2 {
		return false
	}
	first := slices.Index(weekdays, arguments[0])
	last := slices.Index(weekdays, arguments[len(arguments)-1])
	return first >= 0 && last >= 0 && within([]int{int(now.Weekday())}, []int{first}, []int{last})
}

// timeRange is the script's function: (hour), (hour, hour), (hour, minute, hour,
// minute) or with seconds, each with "GMT" behind it if need be. As in browsers
// the last hour, minute or second is part of the range: timeRange(9, 17) ends at
// 17:59:59.
func timeRange(now time.Time, arguments []string) bool {
	now, arguments = inZone(now, arguments)
	numbers := make([]int, len(arguments))
	for i, argument := range arguments {
		number, err := strconv.Atoi(argument)
		if err != nil {
			return false
		}
		numbers[i] = number
	}
	clock := []int{now.Hour(), now.Minute(), now.Second()}
	switch half := len(numbers) / 2; len(numbers) {
	case 1:
		return numbers[0] == now.Hour()
	case 2, 4, 6:
		return within(clock[:half], numbers[:half], numbers[half:])
	}
	return false
}

// datePart is one argument of dateRange: a day of the month, a month or a year.
type datePart struct {
	unit  byte // 'd', 'm' or 'y'
	value int
}

// dateRange is the script's function: one or two of day, month or year, or pairs
// of (day, month), (month, year) or (day, month, year), each with "GMT" behind it
// if need be.
func dateRange(now time.Time, arguments []string) bool {
	now, arguments = inZone(now, arguments)
	parts := make([]datePart, len(arguments))
	for i, argument := range arguments {
		if month := slices.Index(months, strings.ToUpper(argument)); month >= 0 {
			parts[i] = datePart{'m', month + 1}
			continue
		}
		number, err := strconv.Atoi(argument)
		switch {
		case err != nil || number < 1:
			return false
		case number > 31: // as browsers part days from years
			parts[i] = datePart{'y', number}
		default:
			parts[i] = datePart{'d', number}
		}
	}
	switch len(parts) {
	case 1:
		return value(now, parts[0].unit) == parts[0].value
	case 2, 4, 6:
	default:
		return false
	}
	// Both halves name the same units in the same order; from the least significant
	// to the most, so they are turned round for the comparison.
	var at, first, last []int
	half := len(parts) / 2
	for i := half - 1; i >= 0; i-- {
		if parts[i].unit != parts[i+half].unit {
			return false
		}
		at = append(at, value(now, parts[i].unit))
		first = append(first, parts[i].value)
		last = append(last, parts[i+half].value)
	}
	return within(at, first, last)
}

// value is one unit of a time, as a datePart has it.
func value(now time.Time, unit byte) int {
	switch unit {
	case 'd':
		return now.Day()
	case 'm':
		return int(now.Month())
	}
	return now.Year()
}
